"""One file per place to run: the file's name, with dashes, is what `--profile` takes.

A profile is a module with `render(config, options, files) -> list[Manifest]`. For the Kubernetes of some cloud that is
one `clouds.Cloud`; see `generic.py`.
"""
