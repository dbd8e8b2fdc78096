"""The channel between front end and engine: frames over a Unix socket pair, and the watch over the process.

front end (asyncio)                                              engine process (sync)
  EngineHandle <- EngineLink  ==== FrontEndFrame ===>  inbox thread -> EngineLoop -> Engine
                              <=== EngineFrame =======  (one StepOutput a step; a heartbeat thread)
  EngineSupervisor starts, watches, kills and restarts the process
"""
