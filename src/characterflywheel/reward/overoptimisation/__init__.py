"""How far may a reward model be optimised? Proxy and gold reward over the distance from the policy's start.

The proxy drives selection and RL; the gold model was trained on other prompts with another seed and drives nothing
(Gao, Schulman, Hilton 2022; PAPER sections 3 and 8). Read `best_of_n` and `rollouts`, which measure the two ways of
optimising, then `forms`, which fits them, and `stage`, which runs it all after RL.
"""
