"""The planner: memory per rank, FLOPs and time of a step for a parallel layout, and a search for layouts that fit."""
