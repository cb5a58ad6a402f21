"""Sends requests to a running model and says honestly how it did.

Nothing here imports Locust (and with it gevent's monkey-patching) except `loadtest/locustfile.py`, which only
ever runs inside the subprocess that `loadtest.run` starts.
"""
