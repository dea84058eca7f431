"""How the server is packed, run and watched: images, the compose stack, Prometheus, Grafana, and what checks them."""
