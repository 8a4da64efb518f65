"""A language model that can be cut between any two layers; knows no network."""
