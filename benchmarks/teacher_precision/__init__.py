"""What does a teacher in 8 bits cost the student?"""
