"""Rollout: shadow, canary, promotion or rollback, decided with a stated error rate."""
