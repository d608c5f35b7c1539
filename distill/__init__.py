"""The method: trajectories, objectives, training and evaluation of few-step students."""
