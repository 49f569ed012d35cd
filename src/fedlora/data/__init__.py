"""Examples: where they come from, who owns them, what each client trains, holds out and tests on.

`population.build(settings, task)` does it all; the other modules are its steps, in order: `settings`, `sources`
(files to rows), `fields` (rows to our columns, checked), `partition` (rows to clients), `duplicates` and `split`
(a client's rows to fit, holdout and test). `profiles` gives clients ranks, `preview` shows a population,
`keys` turns client ids into path parts.
"""
