"""Scale-out on Ray: every actor is a simulator with its own base, and what travels are partial aggregates.

``worker.py`` is the inside of an actor, ``pool.py`` gives shards to actors and those of a lost one to another,
``host.py`` is the run's side: the fleet, and connecting to a cluster.
"""
