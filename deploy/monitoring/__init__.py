"""Configuration of Prometheus and Grafana, and the dashboard's picture without Grafana."""
