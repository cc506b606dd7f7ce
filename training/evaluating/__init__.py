"""Trained models at work: evaluated on data (`validate.py`), and asked for the classes of images (`predict.py`)."""
