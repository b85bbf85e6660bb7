"""The tests. A package, since gpuhunt installs one of this name, which would be found in place of a mere folder."""
