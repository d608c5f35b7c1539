"""The machines: Ray processes, DeepSpeed engines, placement and supervision around `distill`."""
