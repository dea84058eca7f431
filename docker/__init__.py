"""Deployment: images, the compose stack, Prometheus and Grafana, and the checks of all these."""
