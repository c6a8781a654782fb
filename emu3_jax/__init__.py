"""The language model and everything that trains it. Imports nothing from the other folders."""
