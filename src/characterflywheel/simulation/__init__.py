"""The embedded world: a simulated crowd behind the same doors as real people (DESIGN section 7).

What is real stays real: people's words come from conversations between people, and lengths of stays, messages,
pauses, visits and ratings are fitted to them. The crowd's reactions follow a hidden utility, which nothing in the
pipeline may read: `world.SimulatedPeople` is the only thing here that it is handed, as `people.People`.
"""
