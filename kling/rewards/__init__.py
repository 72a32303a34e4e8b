"""Rewards: functions from clips, the requests that they answer and the truth, to numbers. A new one is one function; see `reward.py`."""
