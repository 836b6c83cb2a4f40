// In your app, this file is generated: supabase gen types --lang typescript --remote > app/database.ts
export type { Database } from '../../../supabase/types/database'
