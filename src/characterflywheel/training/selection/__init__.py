"""What rejection sampling is made of: shares of the pool, drawing that resumes, the rule of acceptance (PAPER 4)."""
