"""Spot or on-demand, with a deadline to keep: pure decisions, and what they cost on recorded availability.

policies   what to hold now, from what is left and what can be had; all keep the deadline while on-demand exists
windows    a job along a stretch of a fleet: dollars, and when it is done
chooser    tries the policies on the recent past and takes the cheapest
"""
