from services.rollout.main import run

run()
