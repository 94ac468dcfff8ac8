"""Watches a canary, and makes it champion or takes it out: a small process of its own, without Ray."""
