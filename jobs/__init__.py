"""One thin, submittable entry point a stage: `python -m jobs.STAGE CONFIG [section.key=value …]`."""
