"""What a layout needs: memory of every rank, FLOPs and time of a step, and the layouts that fit."""
