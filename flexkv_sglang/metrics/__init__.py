"""Counters, histograms and gauges: the catalogue of their names, their values, and their export to Prometheus.

The modules that count belong to other folders. No name is counted that is not in the catalogue.
"""
