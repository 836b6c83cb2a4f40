// In your app, this file is generated: supabase gen types --lang typescript --remote > src/database.ts
export type { Database } from '../../../supabase/types/database'
