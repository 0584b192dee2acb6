"""What a study will cost: jobs, time, memory, traffic and disk (torch-free).

The Snakefile asks what jobs need at parse time, in every job: nothing here imports NumPy.
"""
