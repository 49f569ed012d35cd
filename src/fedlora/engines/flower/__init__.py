"""Flower as the engine between machines: everything that touches ``flwr`` is in this folder.

server (the run's loop, ``host``) -> ``fleet`` -> Grid -> SuperLink -> SuperNode -> ``client_app`` -> ``channel`` ->
``worker`` (the site's own process: base model, data, memories). What travels is in ``messages``.
"""
