"""Text → token windows, statistics gathered on them, and the layer-by-layer walk that feeds both."""
