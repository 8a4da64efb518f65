"""The phone side: one user, one decision per request."""
