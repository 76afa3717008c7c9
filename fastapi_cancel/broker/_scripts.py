"""What must happen in Redis in one piece.

A log is a stream whose ids are ``epoch-number``. Redis remembers the last id of a stream even when all its
entries have been trimmed, so the number goes on for as long as the key lives. Redis 7 could count by itself
(``XADD key 5-*``); 6.2 cannot.
"""

_LOG = """
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function last_id(key)
  local info = redis.pcall('XINFO', 'STREAM', key)
  if info.err then return nil end
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end

local function forget_old(key, max_age)
  local oldest = now() - max_age
  while true do
    local entry = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
    if not entry or tonumber(entry[2][2]) >= oldest then return end
    redis.call('XDEL', key, entry[1])
  end
end

local function create(key)
  local id = string.format('%.0f-0', now())
  redis.call('XGROUP', 'CREATE', key, 'none', '$', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', key, 'none')
  redis.call('XSETID', key, id)
  return id
end
"""

PUBLISH = (
    _LOG
    + """
-- the log; the wire format, how many to keep, milliseconds to keep one, the channel
local epoch, number = string.match(last_id(KEYS[1]) or create(KEYS[1]), '(%d+)-(%d+)')
local id = string.format('%s-%.0f', epoch, number + 1)
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], id, 'at', string.format('%.0f', now()), 'event', ARGV[1])
forget_old(KEYS[1], tonumber(ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[4], id .. ' ' .. ARGV[1])
return id
"""
)

LOOK = (
    _LOG
    + """
-- the log; milliseconds to keep it. Its newest id; it is kept for as long as somebody looks.
local id = last_id(KEYS[1]) or create(KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
"""
)

READ = (
    _LOG
    + """
-- the log; the id to begin behind, how many to read, milliseconds to keep one
local id = last_id(KEYS[1]) or create(KEYS[1])
forget_old(KEYS[1], tonumber(ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {id, redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])}
"""
)
