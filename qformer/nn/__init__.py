"""Pure tensor code: attention, the Q-Former, likelihoods per token."""
