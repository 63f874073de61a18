"""The files of published benchmarks of reward models, as downloaded: how their rows are read and scored."""
