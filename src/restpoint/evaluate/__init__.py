"""Speed side by side with the baselines, faithfulness included."""
