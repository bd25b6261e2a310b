"""Requests in, tokens out: scheduling, batching, sampling."""
