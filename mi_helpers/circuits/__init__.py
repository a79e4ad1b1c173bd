"""Circuits of features: replacement models, graphs, interventions."""
