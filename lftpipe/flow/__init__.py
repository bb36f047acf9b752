"""The theory: probability paths, velocities, solvers, objectives.

Arrays in, arrays out: no disk, no model loading. Names are the paper's and those of flow-matching
libraries: `x_0, x_1, t, velocity, path, solver`.
"""
