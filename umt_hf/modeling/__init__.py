"""Exactly what travels to the Hub: networks, their configurations, masks and losses."""
