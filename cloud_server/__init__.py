"""The cloud side: many phones, one full model, one batch."""
