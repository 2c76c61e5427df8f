"""Counters, histograms and gauges, their one catalog, and how Prometheus gets them."""
