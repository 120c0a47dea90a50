"""What happens inside a model: names of stages, logit lens, rollout, saliency, pictures."""
