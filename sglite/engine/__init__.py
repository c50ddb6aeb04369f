"""Scheduling, running and sampling: from requests to tokens."""
