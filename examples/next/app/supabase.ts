import { createBrowserClient } from '@supabase/ssr'
import type { Database } from './database'

/** The browser's client; there is one, however often this is called. */
export const browserClient = () =>
  createBrowserClient<Database>(process.env.NEXT_PUBLIC_SUPABASE_URL!, process.env.NEXT_PUBLIC_SUPABASE_PUBLISHABLE_KEY!)
