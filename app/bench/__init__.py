"""The one way to measure: what `instep bench` runs. Nothing but app/cli imports it.

Knows nothing of how a measurement is shown.
"""
