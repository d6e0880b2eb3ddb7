"""Broken inputs for every reader: a reader answers, or says in a sentence what is wrong. New readers join in `readers.py`."""
