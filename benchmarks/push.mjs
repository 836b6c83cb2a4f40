// Hears broadcasts with the unmodified supabase-js, and says when (nanoseconds of the machine's monotonic clock, the
// one Python's time.monotonic_ns reads). Environment: SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC.
import { createClient } from '@supabase/supabase-js'
import WebSocket from 'ws'

const { SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC } = process.env
const say = (line) => console.log(JSON.stringify(line))
const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, { realtime: { transport: WebSocket } })

supabase
  .channel(TOPIC)
  .on('broadcast', { event: 'ping' }, (message) =>
    say({ n: message.payload.n, at: process.hrtime.bigint().toString() }))
  .subscribe((status) => say({ status }))
