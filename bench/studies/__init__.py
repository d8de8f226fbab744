"""Claims on averages of weights, tried on scikit-learn's digits: `python -m bench.studies wsm`."""
