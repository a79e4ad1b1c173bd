"""One room a lesson: experiments, figures, claims, exercises."""
