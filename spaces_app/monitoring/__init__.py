"""Watching the Space: metrics, alerts, and what the owner's dashboard shows."""
