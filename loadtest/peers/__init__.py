"""The model of an archive behind other serving frameworks, for `torchport compare`.

One module a framework, each the shortest server that its own documentation would lead to: its own workers, its own
batching, batches of at most 32 in arrival order, padded to the longest. What they share is here: `model.py` decodes,
computes and answers with the code of the archive's own handlers, so that what differs is the framework alone.

Each is a process of its own, `python -m loadtest.peers.peer_x --folder F --port P --threads T --workers W`, and runs in
the peers' own virtual environment (`loadtest/compare_environment.py`). Nothing else imports the `peer_` modules.
"""
