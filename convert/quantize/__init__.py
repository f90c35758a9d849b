"""Offline quantisation: methods that look at the weights, or at calibration text, for longer than loading may take."""
