"""One file per place that metric rows go to.

Each provides ``build(config, run_dir) -> MetricSink``; none imports torch, so that a driver can use them too.
"""
