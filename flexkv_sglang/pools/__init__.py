"""The host pools of a model: where their pages lie in memory, and one store per pool, opened and closed together.

Nothing here imports SGLang (``integration`` does), and nothing here knows files (``cache`` does).
"""
